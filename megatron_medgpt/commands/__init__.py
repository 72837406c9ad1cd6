"""The commands of ``medgpt``, by what they work on. Each calls one function of a room; nothing is computed here.

Rooms are imported inside the commands: ``medgpt --help`` answers at once.
"""
