"""How far each metric tracks a probe: run tables, statistics, report."""
