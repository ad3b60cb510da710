"""How well label-free metrics track probes: tables of runs, statistics, and a report."""
