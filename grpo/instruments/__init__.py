"""What measures a run: its log, its clock, its multiply-adds, its memory and its communication."""
