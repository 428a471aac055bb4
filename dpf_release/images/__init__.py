"""Pixels in: from a source of images to uint8 tensors by row, with the unreadable ones found and listed.

`sources` (a folder, a CSV file; a further kind of source is one function there), `read` (which source, and every split
that it does not name: `splits`), `table` (what comes of it: paths, targets, splits), `decode` (one file, resized and
cropped), `dataset` (a table's images, decoded ahead), `survey` (which cannot be decoded), `grid` (a figure of images
side by side).

It knows nothing of networks and banks.
"""
