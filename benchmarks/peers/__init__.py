"""This runtime beside its peers on one CPU; see ``__main__``.

``engines`` holds one small adapter per peer and the measurements, which are the same for all; it runs under each
peer's own Python, so it imports the standard library, numpy and that peer only.
"""
