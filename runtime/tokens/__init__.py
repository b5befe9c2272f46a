"""Compressed tokens on disk: token files, the cache of seen pictures, the job that writes many."""
