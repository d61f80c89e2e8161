"""Rollout: a version becomes the one that answers, or goes back; two versions side by side.

One repository has one `serve up`: a release is loaded in the server that its repository names, and a second one would
go on with the old version.
"""
