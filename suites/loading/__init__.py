"""Where tasks come from: lm-eval's definitions, YAML files of the user's, generators, and extractors of answers."""
