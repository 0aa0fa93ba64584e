"""The load test: one seeded workload, real users from Locust, and the report that compares engines."""
