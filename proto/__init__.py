"""Names the wire: ``.proto`` sources and the Python generated from them (``make proto``). Holds no logic."""
