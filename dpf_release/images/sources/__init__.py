"""Where images come from: each module reads one kind of source into an `images.table.ImageTable`.

`folder` reads `train/CLASS/*.jpg` or `CLASS/*.jpg`, `csv_file` a table. `images.read` chooses between them. A source
of another kind (WebDataset, Hugging Face `datasets`) is one more module here, and one more case there.
"""
