"""The load test for any OpenAI-compatible server: one seeded workload, users from Locust."""
