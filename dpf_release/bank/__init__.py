"""Feature banks: rows of features on disk and back, in format 1.

In the order in which a row passes them: `format` (the index, what lies in a shard, and as what numbers), `writer` (how
many rows a shard gets, and each shard whole or not at all), `build` (all shards by all ranks, under a plan that is on
disk before row 0), `hdf5_check` (structure, before HDF5 sees a file), `reader` (`FeatureBank`), `rows` (rows by number
from one bank, from several as one, or some of one), `dataset` (torch data set, loader, `concat`), `drop_rows` (a bank
without some rows); `procedure_format` (which tensors say how rows were drawn).

It knows nothing of images, networks and functions, nor where a bank lies. All but `build` and `dataset` loads no
torch.
"""
