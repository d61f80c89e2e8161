"""Groups: channels that go together or not at all, found and tried."""
