"""Programs around the stages; run them from the root: python -m tools.NAME --help"""
