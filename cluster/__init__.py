"""Places, routes, heals and serves: the Ray backend and controller, pools, router, gateway, client and CLI.

May import everything. Never does model arithmetic. Only ``ray_backend.py`` and ``controller_actor.py`` import Ray.
"""
