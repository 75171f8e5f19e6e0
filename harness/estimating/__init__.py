"""What a plan costs before it runs: memory, seconds, tokens, money, on this machine or on another. No torch."""
