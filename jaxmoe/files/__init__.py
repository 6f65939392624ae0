"""Outputs that appear whole or not at all, written by one process at a time.

`outputs` writes single files, `workspace` prepares folders such as checkpoints; both rest on the
lock and the atomic replacement in `atomic`.
"""
