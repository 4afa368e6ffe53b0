"""Input checks, accurate floating-point formulas, bfloat16 pairs, trees and files: used by all other folders."""
