"""Planted faults: a catalogue of wrong passes, and the harness that shows each to the proof."""
