"""How results are told: in words (`headline`), as digits (`numbers`), plots, on the terminal, on a page.

`page` is the owner's, with images of S; `public_page` has the same numbers and images of Q only; `gallery` in
`evaluation` keeps the images. `frontier_points` are those of several functions.
"""
