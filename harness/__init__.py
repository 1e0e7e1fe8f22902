"""What lad.py, verify.py and eval.py stand on, and no reader of the method needs. Nothing in here
imports what stands above it."""
