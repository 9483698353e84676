"""What people look at: tables for a terminal and one HTML page."""
