"""The load test: one seeded workload, users from Locust, and the report that compares engines."""
