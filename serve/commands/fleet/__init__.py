"""Commands: those of serve for more machines than this one."""
