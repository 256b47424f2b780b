"""Schedules: how a probe's learning rate changes. One kind in one file."""

from featcache.kinds import Registry
from featcache.probes.schedules.constant import Constant
from featcache.probes.schedules.cosine import Cosine
from featcache.probes.schedules.schedule import Schedule
from featcache.probes.schedules.step import Step

SCHEDULES = Registry(Schedule, "featcache.schedules", "schedule", [Constant, Step, Cosine])
