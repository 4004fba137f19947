"""Callbacks for the trainers that people use: one file for each, which alone imports its framework."""
