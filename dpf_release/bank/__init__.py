"""Feature banks: rows of features on disk and back, in format 1.

In the order in which a row passes them: `encodings` (how a number is stored: an `int8` would be one more entry),
`format` (the index and what a shard is), `writer` (a shard whole or not at all; its size), `build` (all shards by all
ranks, under a plan that is kept before row 0), `hdf5_check` (structure, before HDF5 sees a file), `reader`
(`FeatureBank`), `rows` (what numbers rows through: one bank, several as one, some of one), `dataset` (torch data set,
loader, `concat`), `drop_rows`.

It knows nothing of images, networks and functions, nor where a bank lies. All but `build` and `dataset` loads no
torch.
"""
