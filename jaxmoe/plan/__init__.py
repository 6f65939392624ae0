"""What lands where and what fits: by formula, and by the compilers of absent hardware."""
