"""Scenario: several phases of load in one file, and what they have to show."""
