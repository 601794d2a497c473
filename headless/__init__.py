"""The pack's work without a screen: `python -m headless`, run in the pack's folder."""
