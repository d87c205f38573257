"""Guards for what other people, programs and crashes may have written: names, files, JSON, text.

Every package may import this one; it imports none of them.
"""
