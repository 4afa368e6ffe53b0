"""What everything else uses: checks of the input, formulas that are exact in floating point, trees."""
