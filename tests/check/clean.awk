# C source without comments, strings, characters and preprocessor lines; line numbers stay. Before
# each line go a tab and the section it is in (`// >>name` starts one; >>forward is a block inside
# of one).
BEGIN { section = "none" }
{
    line = $0
    if (!comment && line ~ /^\/\/ >>[a-z]/ && line !~ />>forward/)
        section = substr(line, 6, match(substr(line, 6) ".", /[^a-z]/) - 1)
    if (!comment && (directive || line ~ /^[ \t]*#/)) {
        directive = line ~ /\\$/
        print section "\t"
        next
    }
    out = ""
    n = length(line)
    for (i = 1; i <= n; i++) {
        c = substr(line, i, 1)
        two = substr(line, i, 2)
        if (comment) {
            if (two == "*/") { comment = 0; i++ }
        } else if (two == "/*") {
            comment = 1
            i++
        } else if (two == "//") {
            break
        } else if (c == "\"" || c == "'") {
            for (i++; i <= n && substr(line, i, 1) != c; i++)
                if (substr(line, i, 1) == "\\") i++
            out = out c c
        } else {
            out = out c
        }
    }
    print section "\t" out
}
