"""One standalone page about runs: verdict, charts, comparison, alarms and cost."""
