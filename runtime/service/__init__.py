"""The encoder as a service: one bundle open, many who ask, each answered or refused in time.

The core knows no protocol and imports nothing heavy; `adapters` speak the protocols.
"""
