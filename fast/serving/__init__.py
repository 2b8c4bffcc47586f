"""Answer requests over HTTP in the form of the OpenAI API."""
