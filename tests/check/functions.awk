# From clean.awk's lines, the functions of a C file:
#     F name first-line last-line section static|public     a definition
#     P name first-line last-line section static|public     a prototype
BEGIN { FS = "\t" }

function name_of(text,   n) { # the first orch_ or orchi_ name before a parenthesis, or nothing
    if (text ~ /^ *(typedef|struct|enum|union) *[A-Za-z_]* *\{?$/ || text ~ /typedef/) return ""
    if (!match(text, /[^A-Za-z0-9_(]orchi?_[a-z0-9_]* *\(/)) return ""
    if (index(substr(text, 1, RSTART), "=")) return ""
    n = substr(text, RSTART + 1, RLENGTH - 1)
    sub(/ *\($/, "", n)
    return n
}
function kind_of(text) { return " " text ~ /[^a-z]static[^a-z]/ ? "static" : "public" }

{
    n = length($2)
    for (i = 1; i <= n; i++) {
        c = substr($2, i, 1)
        if (depth > 0) {
            if (c == "{") depth++
            if (c == "}" && --depth == 0) {
                if (name != "") print "F", name, first, NR, section, kind
                text = ""
            }
            continue
        }
        if (text == "" && c !~ /[ \t}]/) { first = NR; section = $1 }
        if (text != "" || c !~ /[ \t}]/) text = text c
        if (c == "(") parens++
        if (c == ")") parens--
        if (parens > 0) continue
        if (c == ";") {
            name = name_of(text)
            if (name != "") print "P", name, first, NR, section, kind_of(text)
            text = ""
        }
        if (c == "{") {
            if (text ~ /^extern *"" *\{$/) { text = ""; continue }
            name = name_of(text)
            kind = kind_of(text)
            depth = 1
        }
    }
    if (text != "") text = text " "
}
