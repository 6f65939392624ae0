"""The project's own checkpoints on disk: Orbax's layout, one Zarr array per parameter."""
