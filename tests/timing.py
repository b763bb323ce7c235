"""How long tests wait. A busy machine may stand still for seconds, so no wait here tells how fast anything is."""

from __future__ import annotations

# For what an event brings about at once: less than the timeouts that would bring it about in the end, all of which
# are 10 s and more, so that what only they do is noticed.
PROMPTLY_S = 9.0
# For what takes a while: processes start, models load.
PATIENTLY_S = 120.0
