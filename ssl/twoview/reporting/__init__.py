"""Reports: tables, plots, pages and files."""
