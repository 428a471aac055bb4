"""The owner's private folder: where everything lies, who may read it, and how it lies on the disk.

`permissions` says that it is its owner's alone, before anything is read. `vault` is the layout: paths, records, the id
map. Members lie on the disk as `storage` has it: plain, or encrypted in the format of `age`; nobody outside of this
package asks which. `contents` knows every file that a command writes, `sealing` changes the vault as a whole (`vault
seal`, `open`, `forget`, `check`), `staging` is where a release is built. `ledger` and `retractions` are two records.

It knows nothing of networks and functions, and loads no torch.
"""
