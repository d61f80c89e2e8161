"""Deploy: what a cluster or docker compose is told to serve a repository.

The manifests are templates with a comment at each choice, so that who reads them need not ask why. None was run on a
cluster by us; the tests hold each to the schemas of what reads it.
"""
