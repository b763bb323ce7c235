"""The commands of ``fuseline``, one file each. What needs torch or Ray is imported when its command runs."""
