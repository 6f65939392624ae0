EVERY_AXIS = [  # of the mesh alone on all eight devices, and two meshes of three axes
    "data=8",
    "fsdp=8",
    "expert=8",
    "sequence=8",
    "tensor=8",
    "data=2,fsdp=2,expert=2",
    "expert=2,sequence=2,tensor=2",
]
# Twenty losses on a mesh and on one device differ by float32's sums in another order: by up to 4e-7
# in the first steps, and by 2e-6 once twenty updates have added up and losses are a hundredth of
# the first. A router's choice that rounding flips would show as a jump.
EVERY_AXIS_RTOL = 1e-5
