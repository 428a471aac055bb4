"""The command line: each command parses, calls one public function, prints what it returned.

`main` is the entry point, `app` has the options that commands share; `owner`, `vault` and `auditor` have the
commands, `printing` what several print, `demo` the whole path on images that a dependency ships. Nothing heavy is
imported before a command runs.
"""
