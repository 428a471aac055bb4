"""What several packages need and that has nothing to do with images or networks.

Files that appear whole or not at all (`files`), a folder held by one run (`locks`), sizes as people write them
(`sizes`), the allocator's settings (`memory`), bounded JSON of strangers (`bounded_json`), reading ahead in a thread
(`read_ahead`), several processes as one run (`ranks`, the only one with torch), progress lines (`progress`), HTML
pages (`html`), declared parameters in a name (`parameters`), code from outside this package (`own_code`), and what an
array of row numbers is called (`arrays`).

It knows nothing of banks, images, networks, releases and vaults. What only one package needs lies in that package.
"""
