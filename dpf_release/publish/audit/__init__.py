"""`audit`: every artefact of a release and of its vault, and every check of the release as it is now.

`audit` walks the artefacts, `describe` says what each holds, `engine` runs the `checks`, `page` and `terminal` print.
"""
