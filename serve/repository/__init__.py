"""Repository: models and their versions on disk, read, checked and written.

A change of configuration is a new version: `config.pbtxt` is a copy of what the live version's lineage holds, digest
included, so a rollback brings back the configuration too. A lineage says all that `serve` and `loadtest` need to know
of a model: they never run the user's code. The files that it names are all that may stand in a version's folder, for
Triton looks there for a backend's shared library before it looks anywhere else.
"""
