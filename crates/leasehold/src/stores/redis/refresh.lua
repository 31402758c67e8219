-- KEYS: lock, fence. ARGV: process, ms that it counts as alive, attempt, then claims of that process that wait in line.
-- Answers: value and remaining ms of the lock, then for each claim how many are ahead, or -1 if it is not in line; or an error.
local call, pcall = redis.call, redis.pcall
local value = pcall('GET', KEYS[1])
if type(value) == 'table' then return redis.error_reply('WRONGTYPE lock') end
local claims = {}
for i = 4, #ARGV do claims[i - 3] = ARGV[i] end
local wish = ARGV[1] .. ' ' .. ARGV[2] .. ' ' .. ARGV[3]
local ranks = line('refresh', nil, KEYS[1], KEYS[2], nil, value, wish, nil, claims)
if ranks.err then return ranks end
value = value or pcall('GET', KEYS[1])
return {value and string.sub(value, 1, 4300) or '', call('PTTL', KEYS[1]), unpack(ranks)}
