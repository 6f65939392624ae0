"""Checkpoints: published ones in, the project's own on disk, and published ones out.

`store.load` and `store.save` move parameters between devices and a folder, `convert.convert` makes
such a folder from a Hugging Face or Meta checkpoint, and `export.export` makes a Hugging Face one
from it. The way of a tensor from a published file to an array:

    convert.conversion.convert(source, output)
      convert.source.open_source      reads the configuration and the headers of the files
        mapping.tensors.expand          `mapping.names`, the table, for this model: its groups
        mapping.match.match             checks that the files have these tensors and no others
      convert.recode.plan             a job for each group, or for matrices that change their format
      zarr.writer.Writer.create       the job's arrays
      Job.steps                       for each block of the group:
        Source.read_block
          TensorFiles.read              bytes of a file (`formats.safetensors`, `formats.pth`)
          Layout.split                  the slices of the parameters in them (`mapping.layout`)
        quantize_matrix                 if the format changes, of one whole matrix
      Writer.write                    the blocks, into the arrays' files
      Writer.finish                   the arrays become an Orbax checkpoint with a manifest

`convert.verification.verify` goes the same way up to the steps, and compares instead of writing.
`export.export` goes back through the same groups: `StoredArray.read`, `Layout.join`, and
`formats.safetensors.write_file`.
"""
