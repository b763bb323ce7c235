"""Places, routes, heals and serves: the Ray backend and controller, pools, router, gateway, client and CLI.

May import everything. Never does model arithmetic. Only ``ray_backend.py``, ``controller_actor.py`` and
``worker_actor.py`` import Ray.
"""
