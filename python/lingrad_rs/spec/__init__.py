"""What a caller asks for, and what a plan holds, as data: nothing here computes."""
