"""Reports: tables, figures, pages and files."""
