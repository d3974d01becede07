"""Measurements of a run: log, clock, multiply-adds, memory and communication."""
